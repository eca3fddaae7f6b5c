"""Click data: sources, their formats, and batches. A format is a file that reads rows into memory or as needed."""
