"""One file an endpoint family; a handler decodes, asks the engine, answers. All else is middleware."""
