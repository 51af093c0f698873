"""Drop-in replacements for modules that rankwise succeeds."""
