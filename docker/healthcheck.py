"""HEALTHCHECK of the image: exit 0 when the server in this container says that it is ready.

GMCONV_HEALTH_URL overrides the address, for another port or TLS (whose certificate names another host, so it is not
verified: the connection never leaves the container, so no proxy is asked either).
"""

import os
import ssl
import sys
import urllib.request

url = os.environ.get("GMCONV_HEALTH_URL", "http://127.0.0.1:8000/v2/health/ready")
if not url.startswith(("http://", "https://")):
    sys.exit(f"GMCONV_HEALTH_URL={url}: not an http or https address")
direct = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
)
try:
    with direct.open(url, timeout=2) as response:
        sys.exit(0 if response.status == 200 else f"{url}: {response.status}")
except OSError as error:
    sys.exit(f"{url}: {error}")
