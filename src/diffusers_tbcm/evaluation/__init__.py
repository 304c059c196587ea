"""Drawing pictures and measuring them."""
