"""Training with explanations: W(x) as a function of the parameters, losses on it, and tasks for timm's train.py."""
