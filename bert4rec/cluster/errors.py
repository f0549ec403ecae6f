"""The error of a Ray process as one readable line."""

from ray.exceptions import RayError


def root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, without the exceptions that Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
    return root_cause(inner) if isinstance(inner, BaseException) and inner is not error else error


def first_line(error: BaseException) -> str:
    """An error as one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayError) else 0]}" if lines else repr(error)
