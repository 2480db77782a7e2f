"""Are the latents of a trained model used? Interventions, leakage, structure, pictures, and one verdict."""
