package outbox

// WithMemory makes an audit know so many messages at a time.
func (c AuditConfig) WithMemory(messages int) AuditConfig {
	c.memory = messages
	return c
}
