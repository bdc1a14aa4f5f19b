"""Object stores: what lies at s3://, gs:// and az:// comes here as files, and what is written here goes there whole."""
