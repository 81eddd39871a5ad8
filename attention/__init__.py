"""What attention computes and remembers: multi-head latent attention, rope, the paged latent cache, the TP service."""
