"""The room that speaks HTTP. It knows requests and answers, and of the engine only its front."""
