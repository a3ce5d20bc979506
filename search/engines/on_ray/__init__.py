"""How the engine `ray` works: Ray started and stopped, our own loop, Ray Tune. Nobody else imports Ray."""
