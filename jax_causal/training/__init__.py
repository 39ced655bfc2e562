"""Training: a procedural world, its data, and the stages from VAE to distilled few-step model."""
