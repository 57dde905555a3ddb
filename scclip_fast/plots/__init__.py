"""Pictures of results: segmentations with a legend, and outliers."""
