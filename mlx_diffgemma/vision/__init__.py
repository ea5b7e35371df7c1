"""Images and video: reads them, and cuts them into the patches that the vision tower takes. NumPy and Pillow only."""
