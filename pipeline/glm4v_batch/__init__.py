"""Caption and annotate images in bulk with GLM-4V models, every record exactly once."""

__version__ = "0.1.0"
