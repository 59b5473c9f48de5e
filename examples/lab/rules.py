"""The rules of heatmaps that the command line knows by name."""

RULES = ("grad_cam", "hires_cam", "layer_cam", "positive_grad_cam", "class_activation")
