"""Talk to fal through libcurl; nothing outside this wing knows libcurl.

* ``client``: :class:`~tornado_fal_proxy.upstream.client.UpstreamClient` starts, watches and ends transfers
* ``transfer``: one call, between libcurl's callbacks and the coroutine that relays
* ``body``: the pieces of a response's body on their way, and when libcurl must pause; it needs no libcurl
* ``decoding``: gzip, deflate and brotli in bounded pieces
* ``handles``: easy handles, configured once and used again
* ``curl_loop``, ``poller``: drive libcurl from Tornado's loop, and notice idle connections that fal has closed
* ``hosts``: which calls wait for the handshake of another
* ``curl_errors``: libcurl's error numbers as ours
"""
