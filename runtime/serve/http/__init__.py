"""REST: HTTP/1.1 connections, the routes of the Open Inference Protocol, images, the page."""
