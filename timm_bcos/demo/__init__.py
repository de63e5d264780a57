"""The Gradio app of `timm-bcos demo`."""
