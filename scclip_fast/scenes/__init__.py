"""A world small enough to ship: drawn scenes with exact masks, and a CLIP trained on them.

`draw` makes the scenes, `train` trained the model, whose configuration and weights lie in this
folder as open_clip writes them.
"""
