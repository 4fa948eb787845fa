"""What files of rows look like, and what rows mean: a file for each container and each format of rows."""
