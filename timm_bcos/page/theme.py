"""How the page looks: as the document that it frames, whose colours `viewer.css` has; with fonts that are there."""

import gradio as gr

__all__ = ["page_theme"]

FONTS = ["Inter", "system-ui", "Segoe UI", "Roboto", "Noto Sans", "Helvetica Neue", "sans-serif"]
COLOURS = {  # by Gradio's name: light, dark
    "body_background_fill": ("#fbfaf8", "#131417"),
    "background_fill_primary": ("#ffffff", "#1c1e22"),
    "block_background_fill": ("#ffffff", "#1c1e22"),
    "body_text_color": ("#1b1c1f", "#ececee"),
    "body_text_color_subdued": ("#64666d", "#9b9da5"),
    "block_info_text_color": ("#64666d", "#9b9da5"),
    "border_color_primary": ("#e4e2dd", "#2d3036"),
    "block_border_color": ("#e4e2dd", "#2d3036"),
    "input_background_fill": ("#f5f4f1", "#2a2c32"),
    "button_primary_background_fill": ("#b8172f", "#c22a40"),
    "button_primary_background_fill_hover": ("#9d1227", "#d33b51"),
    "button_primary_text_color": ("#ffffff", "#ffffff"),
}


def page_theme() -> gr.themes.Base:
    """A theme that asks no other host for fonts."""
    theme = gr.themes.Base(primary_hue="red", neutral_hue="stone", font=FONTS, font_mono=["ui-monospace", "monospace"])
    light = {name: colour for name, (colour, _) in COLOURS.items()}
    dark = {f"{name}_dark": colour for name, (_, colour) in COLOURS.items()}
    return theme.set(**light, **dark, block_radius="14px", button_large_radius="10px", input_radius="10px")
