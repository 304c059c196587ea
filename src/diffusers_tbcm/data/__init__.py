"""What training and evaluation read: prompts, captioned pictures, and the caches of their embeddings and latents."""
