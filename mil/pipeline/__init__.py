"""One study from config to report, in chapters: data, training, results."""
