"""The pictures of README's models, taken from the executed notebooks.

python docs/models.py
"""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
# picture: the notebook, and the call whose figure it is
PICTURES = {
    "toy": ("04_plain_vae_and_toy", "plots.latent_map(loaded"),
    "terms": ("05_what_each_term_does", "plots.latent_maps("),
    "conditional": ("06_conditional", "plots.class_grid(cvae"),
    "semi_supervised": ("07_semi_supervised", "plots.class_grid(m2"),
    "mixture": ("08_mixture", "plots.class_grid(vae"),
    "hierarchical": ("09_hierarchical", "plots.samples("),
}


def picture(notebook: str, call: str) -> bytes:
    """The PNG of the one cell that makes this call."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    (cell,) = (c for c in cells if c["cell_type"] == "code" and call in "".join(c["source"]))
    (data,) = (o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {}))
    return base64.b64decode(data)


if __name__ == "__main__":
    for name, place in PICTURES.items():
        (ROOT / "docs" / "models" / f"{name}.png").write_bytes(picture(*place))
