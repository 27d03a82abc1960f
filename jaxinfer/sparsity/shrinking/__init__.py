"""Programs without the slices that masks removed."""
