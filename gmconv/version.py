"""The version of this package, wherever it runs from: installed, in a checkout, in an image."""

__version__ = "0.2.0"
