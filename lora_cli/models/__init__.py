"""Base models: judged by their files, loaded, and given the face that objectives and stages use."""
