"""Programs that try to break this one: kills at random moments, hostile files, long runs."""
