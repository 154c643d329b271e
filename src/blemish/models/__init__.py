"""Models: each says what a defect-free tile would have shown. One noun a file."""
