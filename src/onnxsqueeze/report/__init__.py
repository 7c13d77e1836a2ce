"""What is drawn from records alone: Markdown, HTML and the table on the terminal. Nothing here measures or loads a model."""
