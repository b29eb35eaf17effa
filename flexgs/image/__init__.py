"""Images: the photometric loss and the measures of quality (PSNR, SSIM, LPIPS)."""
