"""A study in the browser: slides, tile scores over them, reviews. Starlette and uvicorn are used here only."""
