"""The recipe of the embedded teacher, whose weights lie in ../sana_emoji_mini."""
