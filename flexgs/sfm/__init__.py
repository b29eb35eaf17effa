"""Structure from motion: photographs or a video become a capture, with COLMAP."""
