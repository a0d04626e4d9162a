"""M2: a VAE whose data have classes, some known, the others summed over."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.checks import at_least, nonnegative
from pyro_vae.data import UNKNOWN, one_hot
from pyro_vae.typing import Conditional, Distribution
from pyro_vae.vae import Generative, ProgramModule
from pyro_vae.variants.parts import check_labels, known_or


class SemiSupervisedVAE(Generative):
    """p(y) p(z|y) p(x|z, y) with q(y|x) q(z|x, y) (M2: Kingma et al. 2014, sections 2.2 and 3).

    Model and guide take `x` and `labels`, `(N,)` whole numbers, -1 where the class is not known
    (none known, where there are no labels). `ELBO` sums a class that is not known exactly (their
    eq. 7); where it is known, q(y|x) gives way to the label (eq. 6), whose KL is -log p(y).
    `log_marginal` estimates log p(x), and log p(x, y) of rows with labels.

    The parts are those of a conditional VAE whose context is the class, one-hot.

    Args:
        prior: maps the class to p(z|y); `StandardNormal` takes no notice of it.
        likelihood: maps z and the class to p(x|z, y).
        posterior: maps x and the class to q(z|x, y).
        classifier: maps x to q(y|x), a `Categorical`: see `posteriors.Classifier`.
        num_classes: of y; p(y) is uniform.
        label_weight: alpha (eq. 9): in training mode the model also observes the known labels
            under q(y|x), with this weight each. The authors take 0.1 N / N_labelled.
        name: see `VAE`.

    Raises:
        ConfigError: `num_classes` is less than 1, or `label_weight` is negative.
    """

    def __init__(
        self,
        prior: Conditional,
        likelihood: Conditional,
        posterior: Conditional,
        classifier: Conditional,
        num_classes: int,
        label_weight: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        at_least("num_classes", num_classes, 1)
        nonnegative("label_weight", label_weight)
        self.model = ClassModel(
            prior, likelihood, num_classes, classifier if label_weight else None, label_weight,
            name and f"{name}.model",
        )  # fmt: skip
        self.guide = ClassGuide(posterior, classifier, num_classes, name and f"{name}.guide")

    @property
    def classifier(self) -> Conditional:
        """The module (or callable) of q(y|x)."""
        return self.guide.classifier

    def classify(self, x: Tensor, labels: Tensor | None = None) -> Distribution:
        """q(y|x), batch shape `(N,)`; a known label has all the probability."""
        return self.guide.classify(x, labels)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        """q(z|x, y) at the labels, or at the most probable class where there is none."""
        y = self.classify(x, context).logits.argmax(-1)
        return self.guide.posterior(x, self.guide.one_hot[y])

    def decode(self, z: Tensor, context: Tensor) -> Distribution:
        """p(x|z, y) at the labels, `(N,)`, none unknown."""
        return self.model.likelihood(z, self._known(context))

    def prior(self, context: Tensor | None = None) -> Distribution:
        """p(z|y) at the labels, or without them p(z) = sum_y p(y) p(z|y)."""
        if context is not None:
            return self.model.prior(self._known(context))
        components = self.model.prior(self.model.one_hot)
        if not components.batch_shape:
            return components  # the same for every class
        return dist.MixtureSameFamily(self.model.classes(), components)

    def check_context(self, context: Tensor) -> None:
        """Raise unless these are labels.

        Raises:
            DataError: they are not `(N,)` whole numbers below `num_classes`, or -1 for unknown.
        """
        self.guide.check_context(context)

    def _known(self, labels: Tensor) -> Tensor:
        """The classes of labels, one-hot; an unknown one, -1, would index the last class."""
        return one_hot(labels, len(self.model.one_hot)).to(self.model.one_hot)

    def told(self, labels: Tensor | None) -> poutine.condition_messenger.ConditionMessenger:
        """A handler under which the model has these classes, where they are given."""
        given = {} if labels is None else {"y": self._known(labels).argmax(-1)}
        return poutine.condition(data=given)

    def _run_model(self, x: Tensor, context: Tensor | None) -> None:
        with self.told(context):
            self.model(x)


class ClassModel(ProgramModule):
    """y ~ p(y), z ~ p(z|y), x ~ p(x|z, y), and in training label ~ q(y|x)."""

    one_hot: Tensor

    def __init__(
        self,
        prior: Conditional,
        likelihood: Conditional,
        num_classes: int,
        classifier: Conditional | None,
        label_weight: float,
        name: str | None,
    ) -> None:
        super().__init__(name)
        self.prior, self.likelihood, self.classifier = prior, likelihood, classifier
        self.label_weight = label_weight
        self.register_buffer("one_hot", torch.eye(num_classes), persistent=False)

    def classes(self) -> Distribution:
        """p(y), uniform."""
        return dist.Categorical(torch.ones_like(self.one_hot[0]))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Run the model with data `x`, `(N, features)`, and the known labels observed."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.draw(), obs=x)
            self.observe(x, labels)

    def draw(self) -> Distribution:
        """Sample y and z; p(x|z, y) is what is returned."""
        y = self.one_hot[pyro.sample("y", self.classes())]
        z = pyro.sample("z", self.prior(y))
        return self.likelihood(z, y)

    def observe(self, x: Tensor, labels: Tensor | None) -> None:
        """The known labels, under q(y|x): a term of training, of no part in p(x)."""
        if self.classifier is None or labels is None or not self.training:
            return
        known = labels != UNKNOWN
        with poutine.scale(scale=self.label_weight), poutine.mask(mask=known):  # type: ignore[call-overload]
            pyro.sample("label", self.classifier(x), obs=labels.clamp(min=0))


class ClassGuide(ProgramModule):
    """y ~ q(y|x), or the label where it is known; z ~ q(z|x, y)."""

    one_hot: Tensor

    def __init__(
        self, posterior: Conditional, classifier: Conditional, num_classes: int, name: str | None
    ) -> None:
        super().__init__(name)
        self.posterior, self.classifier = posterior, classifier
        self.register_buffer("one_hot", torch.eye(num_classes), persistent=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Run the guide on data `x`, `(N, features)`."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            self.draw(x, labels)

    def check_context(self, context: Tensor) -> None:
        """See `SemiSupervisedVAE.check_context`."""
        check_labels(context, len(self.one_hot))

    def classify(self, x: Tensor, labels: Tensor | None) -> Distribution:
        """q(y|x), or the label where it is known."""
        return known_or(self.classifier(x), labels, len(self.one_hot))

    def draw(self, x: Tensor, labels: Tensor | None) -> None:
        """Sample y and z."""
        y = pyro.sample("y", self.classify(x, labels), infer={"enumerate": "parallel"})
        pyro.sample("z", self.posterior(x, self.one_hot[y]))
