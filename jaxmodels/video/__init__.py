"""Face video in the latent space of a generator: StyleGAN2, its encoders and their critics."""
