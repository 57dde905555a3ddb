"""The page of `scclip-fast app`, and the results that the page shows."""
