"""Models of counts and of latents."""
