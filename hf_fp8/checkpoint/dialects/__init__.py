"""Ways in which other libraries name and describe quantized weights in files."""
