"""What a running server does with a draft: asked, counted, timed, and set beside what replay predicts."""
