"""Drawn scenes with exact masks, and a CLIP trained on them that is small enough to ship.

`draw` makes the scenes. `train` trained the model. Its configuration and weights are in this
folder, in open_clip's format.
"""
