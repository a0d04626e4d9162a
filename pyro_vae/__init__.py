"""Variational autoencoders for people who write Pyro."""
