"""Post-hoc attribution methods, to compare with the explanations of B-cos networks."""
