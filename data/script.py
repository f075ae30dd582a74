"""What the scripts of this repository have in common: short messages and an exit status."""

import sys
import warnings

from aflora import AFLoRAError


def format_warning(message, *_):
    """A warning without path and source line."""
    return f"warning: {message}\n"


def status_of(script, argv):
    """Runs script(argv). Returns 0; 2 after an error the user can fix; 130 if interrupted."""
    if hasattr(sys.stdout, "reconfigure"):  # for a terminal without the freeze map's shades
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = format_warning
    try:
        script(argv)
    except (AFLoRAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
