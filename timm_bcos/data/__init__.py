"""Images as the tools read them: photos, and labeled data sets."""
