from workbench.fleet.fleet import Fleet

__all__ = ["Fleet"]
