"""Colours of the pictures, as hexadecimal RGB."""

# After Wong (Nature Methods 8, 441, 2011), each with enough contrast for thin lines on white.
GREY = "#6b7280"
BLUE = "#0a66b0"
RED = "#c4490a"
GREEN = "#05805f"
PINK = "#b04a86"
OCHRE = "#967000"
SKY = "#2f9bd6"
INDIGO = "#41338f"

LINES = (BLUE, RED, GREEN, PINK, OCHRE, SKY, INDIGO)
"""Of contenders, in their order."""
MARKS = "osD^vPX"
"""Of matplotlib's, one for each of these colours."""
