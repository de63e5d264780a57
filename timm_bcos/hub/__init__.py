"""From a trained network to the Hugging Face Hub."""
