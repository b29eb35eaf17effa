"""Results as tables and pictures, and the published figures to compare them with."""
