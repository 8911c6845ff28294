"""Files of data as they come: the rows of one file, and the files of a folder."""
