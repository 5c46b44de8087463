"""The gRPC server: validates, formats and tokenizes requests, queues them as jobs and streams what workers log."""
