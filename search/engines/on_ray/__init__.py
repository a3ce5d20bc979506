"""How the engine `ray` works: Ray started and stopped, our own loop, Ray Tune. Ray is imported here and nowhere else."""
