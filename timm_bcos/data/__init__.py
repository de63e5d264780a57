"""Images as the tools read them: photos, and labelled data sets."""
